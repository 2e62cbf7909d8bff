"""Checks the English that users read: the documents, and the messages of the code.

    python -m scripts.prose [FILE …]

Without files, it reads every document of the repository and every module of `llm` and `deployments`. Each fault is one
line, FILE:LINE and what to write instead; the exit code is 1 if there is any. The rules cover the commonest faults:
long sentences, words that say nothing, first person, British spelling, doubled words, and clipped or unusual phrases
for which English has a plain one. Code in backticks and blocks of code are not read.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_WORDS = 40
"""Of one sentence. Longer ones have to be read twice."""

_PHRASES = {
    # Words that say nothing.
    r"please": "leave it out",
    r"simply|obviously|basically|of course": "leave it out",
    r"very": "leave it out, or give the figure",
    r"in order to": "to",
    r"e\.g\.": "for example, such as",
    r"i\.e\.": "that is",
    r"etc\.?": "name them, or write: and so on",
    r"via": "through, by",
    r"utili[sz]e[sd]?|leverage[sd]?": "use",
    r"it should be noted|(?<![a-z] )note that": "leave it out",
    r"due to the fact that": "because",
    r"and/or": "or",
    # Phrases that a native engineer would not write.
    r"anew": "again",
    r"for ever": "forever",
    r"whoever": "anyone who",
    r"(?:is|are|was|were) over": "has ended",
    r"(?:go|goes|went|gone) on": "continue",
    r"worked out|works out": "compute",
    r"felled": "brought down",
    r"dearest": "most expensive",
    r"(?:has|have|had) come": "arrived, joined",
    r"comes? along": "is bundled with, comes with",
    r"(?<!separated )by commas": "separated by commas",
    r"of before": "previous",
    r"alike": "the same, equally",
    r"altogether": "in total",
    r"(?<=[,;] )else(?! if\b)": "otherwise",
    r"no JSON": "not JSON",
    r"allows? to|enables? to": "lets you",
    # The field's own terms.
    r"boards?": "dashboard",
}
_SPELLING = {
    r"(\w*(?:token|recogn|normal|optim|summar|initial|serial|organ|real|general|special|minim|maxim|synchron|author|quant"
    r"|prior|emphas|custom|stabil|parallel|vector|categor|util))is(e|es|ed|ing|er|ers|ation|ations)": "-ize",
    r"behaviours?|colours?|favou?rs?(?<=our|urs)|honours?|neighbour(?:s|ing)?|labours?": "-or",
    r"cancelled|cancelling|labelled|labelling|modelled|modelling|travelled|signalled": "one l",
    r"centres?|metres?|litres?": "-er",
    r"licence|defence|offence": "-se",
    r"grey": "gray",
    r"catalogues?|dialogues?": "-og",
    r"analyse[sd]?|analysing": "-yze",
    r"judgement|artefacts?|whilst|amongst|learnt|spelt|programme": "the American form",
}
_MIN_WORDS = 3
"""Shorter texts of the code are names and formats."""
_FIRST_PERSON = re.compile(r"\b(?:I|[Ww]e|[Oo]urs?|us|[Mm]y|me)\b(?![-/])")
_PASSIVE_START = re.compile(
    r"^It (?:is|was|has been) (?:\w+ed|known|seen|said|found|meant|shown|thought) (?:that|to)\b"
)
_DOUBLED = re.compile(r"\b([A-Za-z]+)[ \n]+\1\b")
_DOUBLED_RIGHTLY = {"that", "had"}


@dataclass(frozen=True)
class Fault:
    """One finding: the line of the file, and what to do about it."""

    line: int
    advice: str


@dataclass(frozen=True)
class Block:
    """A paragraph, list item, heading or cell of a table: its text, with line breaks, and the line it begins in."""

    line: int
    text: str

    def line_at(self, offset: int) -> int:
        """The line of the file in which this character of the text is."""
        return self.line + self.text.count("\n", 0, offset)


def compile_phrases() -> list[tuple[re.Pattern[str], str]]:
    """Every phrase that has a better one, as a pattern of whole words, with the advice."""
    table = {**_PHRASES, **{pattern: f"American spelling: {advice}" for pattern, advice in _SPELLING.items()}}
    return [
        (re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE), advice) for pattern, advice in table.items()
    ]


_COMPILED = compile_phrases()


def without_code(text: str) -> str:
    """The text as it is read: code, addresses and the targets of links give way to as many other characters."""

    def hide(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", "_", match[0])

    text = re.sub(r"(`+)[^`]+?\1", hide, text)
    text = re.sub(r"\]\([^)]*\)", lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return re.sub(r"<?https?://\S+", hide, text)


def blocks_of_markdown(text: str) -> Iterator[Block]:
    """What a document says, block by block, without its code."""
    lines: list[str] = []
    begin = 0
    is_code, was_blank = False, True

    def block() -> Iterator[Block]:
        if lines:
            yield Block(begin, without_code("\n".join(lines)))
            lines.clear()

    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip()
        is_fence = content.startswith("```")
        if is_fence or is_code:
            yield from block()
            is_code ^= is_fence
        elif not content or (was_blank and line.startswith("    ") and not re.match(r"([-*]|\d+\.) ", content)):
            yield from block()
        elif content.startswith("|"):
            yield from block()
            for cell in re.split(r"(?<!\\)\|", content.strip("|")):
                yield Block(number, without_code(cell.strip()))
        else:
            if re.match(r"([-*>#]+|\d+\.) ", content):
                yield from block()
                content = re.sub(r"^([-*>#]+|\d+\.) ", "", content)
            if not lines:
                begin = number
            lines.append(content)
            if line.startswith("#"):
                yield from block()
        was_blank = not content
    yield from block()


def blocks_of_python(source: str) -> Iterator[Block]:
    """What a module may say to people, such as errors, log lines and help: each text of three words or more.

    Docstrings are not among them; those that users read are in the generated pages.
    """
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(parents.get(node), ast.Expr | ast.JoinedStr):
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.split()) >= _MIN_WORDS:
            yield Block(node.lineno, without_code(text))


def sentences(block: Block) -> Iterator[tuple[int, str]]:
    """Each sentence of a block, with the offset at which it begins."""
    begin = 0
    for end in re.finditer(r"[.!?:][)\"*]*(?=\s+[A-Z_\"*(\[])|\Z", block.text):
        sentence = block.text[begin : end.end()]
        yield begin + len(sentence) - len(sentence.lstrip()), sentence.strip()
        begin = end.end()


def faults(block: Block) -> Iterator[Fault]:
    """What is wrong with the words of a block."""
    for pattern, advice in _COMPILED:
        for match in pattern.finditer(block.text):
            yield Fault(block.line_at(match.start()), f"{match[0]!r}: {advice}")
    for match in _FIRST_PERSON.finditer(block.text):
        yield Fault(block.line_at(match.start()), f"{match[0]!r}: name who does it, or write: you")
    for match in _DOUBLED.finditer(block.text):
        if match[1].lower() not in _DOUBLED_RIGHTLY:
            yield Fault(block.line_at(match.start()), f"{match[1]!r} stands twice")


def faults_of_sentences(block: Block) -> Iterator[Fault]:
    """What is wrong with the way in which the sentences of a block are built."""
    for offset, sentence in sentences(block):
        words = re.findall(r"[^\s\u2014\u2013=+/|]*\w[^\s\u2014\u2013/|]*", sentence)
        if len(words) > MAX_WORDS:
            yield Fault(block.line_at(offset), f"a sentence of {len(words)} words: {' '.join(words[:5])} …")
        if len(re.findall(r", which\b", sentence)) > 1:
            yield Fault(block.line_at(offset), f"a chain of 'which': {' '.join(words[:5])} …")
        if _PASSIVE_START.match(sentence):
            yield Fault(block.line_at(offset), f"say who: {' '.join(words[:5])} …")


def check(path: Path) -> list[Fault]:
    """The faults of a document or a module, in the order of its lines.

    Texts of the code are not always sentences, and the decisions list figures: of these only the words are judged.
    """
    is_code, is_record = path.suffix == ".py", path.parent.name == "decisions"
    blocks = list((blocks_of_python if is_code else blocks_of_markdown)(path.read_text()))
    found = [fault for block in blocks for fault in faults(block)]
    if not is_code and not is_record:
        found += [fault for block in blocks for fault in faults_of_sentences(block)]
    return sorted(found, key=lambda fault: fault.line)


def public_files() -> list[Path]:
    """Everything in the repository that users read."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    modules = [*(ROOT / "llm").rglob("*.py"), *(ROOT / "deployments").rglob("*.py")]
    return sorted(documents) + sorted(modules)


def main() -> None:
    """Print each fault, and exit with 1 if there is one."""
    found = False
    for path in [Path(name) for name in sys.argv[1:]] or public_files():
        for fault in check(path):
            found = True
            print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{fault.line}: {fault.advice}")
    sys.exit(found)


if __name__ == "__main__":
    main()
