"""What people type: phrasings of each task, small talk with its answers, and things the model cannot do."""

from pathlib import Path
from random import Random

from demo.words import random_word

SKILLS = (
    "I can add and subtract numbers up to 999, spell words backwards, sort and count letters, "
    "continue sequences, count, and write multiplication tables."
)
FALLBACK = f"I am sorry, I do not know that. {SKILLS}"

ADD = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=?",
    "{a} + {b} = ?",
    "What's {a} + {b}?",
    "What is {a}+{b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "Please add {a} and {b}.",
    "Add {b} to {a}.",
    "Can you add {a} and {b}?",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "Tell me the sum of {a} and {b}.",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} =",
    "{a}-{b}=?",
    "{a} - {b} = ?",
    "What's {a} - {b}?",
    "What is {a}-{b}?",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Please subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "Can you subtract {b} from {a}?",
    "Calculate {a} - {b}.",
    "Compute {a} - {b}.",
    "What is the difference {a} - {b}?",
    "What do you get when you take {b} from {a}?",
)
REVERSE = (
    "Spell {w} backwards.",
    "Spell '{w}' backwards.",
    'Spell "{w}" backwards.',
    "Spell the word {w} backwards.",
    "Reverse {w}.",
    "Reverse '{w}'.",
    "Reverse the word {w}.",
    'Reverse the word "{w}".',
    "Reverse the letters of {w}.",
    "Write {w} backwards.",
    "Write '{w}' in reverse.",
    "What is {w} backwards?",
    "What is '{w}' spelled backwards?",
    "How do you spell {w} backwards?",
    "Can you spell {w} backwards?",
    "{w} backwards",
)
SORT = (
    "Sort the letters of {w}.",
    "Sort the letters of '{w}'.",
    'Sort the letters of "{w}".',
    "Sort the letters of the word {w}.",
    "Sort the letters in {w}.",
    "Sort the letters in '{w}'.",
    "Sort the letters of {w} alphabetically.",
    "Put the letters of {w} in alphabetical order.",
    "Put the letters of '{w}' in order.",
    "Arrange the letters of {w} alphabetically.",
    "Can you sort the letters of {w}?",
    "What are the letters of {w} in alphabetical order?",
    "Alphabetize the letters of {w}.",
    "sort letters: {w}",
)
COUNT_LETTER = (
    "How many {l}'s are in {w}?",
    "How many {l}'s are in '{w}'?",
    "How many {l}'s are there in {w}?",
    "How many {l}s are in {w}?",
    'How many "{l}" are in "{w}"?',
    "How many letters {l} are in {w}?",
    "How many {l}'s does {w} have?",
    "How many {l}'s are in the word {w}?",
    "How many times does {l} appear in {w}?",
    "How many times does the letter {l} appear in {w}?",
    "How many times does the letter '{l}' occur in '{w}'?",
    "How often does {l} appear in {w}?",
    "Count the {l}'s in {w}.",
    "Count the letter {l} in {w}.",
    "Count the letter '{l}' in '{w}'.",
    "Count how many times {l} is in {w}.",
)
WORD_LENGTH = (
    "How many letters are in {w}?",
    "How many letters are in '{w}'?",
    "How many letters are there in {w}?",
    "How many letters does {w} have?",
    "How many letters does the word '{w}' have?",
    "How many letters are in the word {w}?",
    "Count the letters in {w}.",
    "Count the letters of '{w}'.",
    "How long is the word {w}?",
    "What is the length of {w}?",
)
NEXT_TERM = (
    "What comes next: {s}?",
    "What comes next: {s}, ...?",
    "What comes next? {s}",
    "What is the next number: {s}?",
    "What is the next number in {s}?",
    "Which number comes next: {s}?",
    "Which number follows {s}?",
    "Continue the sequence {s}.",
    "Continue the sequence: {s}",
    "Continue: {s}",
    "Complete the sequence: {s}, ...",
    "{s}, ...",
    "{s}, what comes next?",
)
NEXT_TERMS = (
    "What are the next three numbers: {s}?",
    "Give the next three numbers: {s}",
    "Give me the next three numbers of {s}.",
    "Continue with three more numbers: {s}",
    "What are the next 3 numbers in {s}?",
    "Next three: {s}",
)
COUNT = (
    "Count from {a} to {b}.",
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Count from {a} up to {b}.",
    "Can you count from {a} to {b}?",
    "Count {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "List the numbers from {a} to {b}.",
    "List all numbers from {a} to {b}.",
    "Numbers from {a} to {b}",
)
COUNT_BY = (
    "Count from {a} to {b} in steps of {k}.",
    "Count from {a} to {b} by {k}.",
    "Count by {k}s from {a} to {b}.",
    "List the numbers from {a} to {b} in steps of {k}.",
)
COUNT_DOWN = (
    "Count down from {a} to {b}.",
    "Count down from {a} to {b}.",
    "Count backwards from {a} to {b}.",
    "Please count down from {a} to {b}.",
)
TABLE = (
    "Write the multiplication table of {a} up to {b}.",
    "Write the multiplication table of {a} up to {b}.",
    "Write the multiplication table for {a} up to {b}.",
    "Give me the multiplication table of {a} up to {b}.",
    "Show the {a} times table up to {b}.",
    "Write the {a} times table up to {b}.",
    "Multiplication table of {a} up to {b}",
)

SMALL_TALK = {
    f"Hello! {SKILLS}": (
        "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there", "Hi there!", "Hello there.", "Good morning",
        "Good evening!", "Good afternoon", "Greetings", "Howdy", "Yo", "Hello, model!", "Hi, how can you help me?",
        "Say hello.", "Hola", "Bonjour", "Hallo",
    ),
    f"I am Rayline's demo model, a small language model trained from scratch. {SKILLS}": (
        "Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me about yourself.",
        "Who is this?", "Are you a language model?", "Are you an AI?", "Which model are you?", "Who made you?",
        "Introduce yourself.", "Are you ChatGPT?", "Are you a robot?", "Are you human?",
    ),
    SKILLS: (
        "What can you do?", "Help", "Help!", "Can you help me?", "How can you help me?", "What do you know?",
        "What can I ask?", "What can I ask you?", "What are you good at?", "What are your skills?", "Help me.",
        "What tasks can you do?", "help please",
    ),
    "I am fine, thank you. What shall I work out?": (
        "How are you?", "How are you doing?", "How are you today?", "How do you do?", "Are you well?",
        "How is it going?", "What's up?",
    ),
    "You are welcome!": (
        "Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much.", "Thanks a lot", "Great, thanks!",
        "Nice, thank you.", "thx", "Well done!", "Good job!", "Great!", "Cool", "Perfect.",
    ),
    "Goodbye!": (
        "Bye", "Bye!", "Goodbye", "Goodbye!", "See you", "See you later!", "Good night", "That's all.", "Farewell",
        "Ciao",
    ),
    "a b c d e f g h i j k l m n o p q r s t u v w x y z": (
        "Say the alphabet.", "Write the alphabet.", "What is the alphabet?", "List the letters of the alphabet.",
        "alphabet", "Recite the alphabet.",
    ),
}  # fmt: skip

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful AI assistant. Answer briefly.",
    "You are a careful mathematician.",
    "Be concise.",
    "Be brief and polite.",
    "Answer with the result only.",
    "You are Rayline, a demo model.",
    "You are a friendly teacher who helps children with numbers and letters.",
    "Respond in English.",
    "Think step by step, then answer.",
    "You answer questions about numbers and words. Do not make anything up. If you do not know, say so.",
)

_UNKNOWN = tuple(Path(__file__).with_name("unknown_questions.txt").read_text(encoding="utf-8").splitlines())

# Ranges of letters of other scripts, symbols and emoji, so that no byte is new to the model.
_SCRIPTS = (
    (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x939), (0x3041, 0x30FE),
    (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x2190, 0x25FF), (0x1F300, 0x1F64F),
)  # fmt: skip


def unknown_question(rng: Random) -> str:
    """Return something the model has no answer for: a question, a remark, noise or another script."""
    kind = rng.random()
    if kind < 0.85:
        template = _UNKNOWN[int(rng.random() * len(_UNKNOWN))]
        while "{" in template:
            template = template.replace("{w}", random_word(rng), 1).replace("{t}", random_word(rng).title(), 1)
            template = template.replace("{n}", str(int(1000 * rng.random())), 1)
        return template
    if kind < 0.92:
        return " ".join(random_word(rng) for _ in range(1 + int(12 * rng.random())))
    low, high = rng.choice(_SCRIPTS)
    letters = [" " if rng.random() < 0.1 else chr(rng.randint(low, high)) for _ in range(1 + int(20 * rng.random()))]
    return "".join(letters).strip() or "?"


def casual(prompt: str, rng: Random) -> str:
    """Return the prompt as someone in a hurry, or very polite, would type it; mostly unchanged."""
    kind = rng.random()
    if kind < 0.8:
        return prompt
    if kind < 0.86:
        return prompt[0].lower() + prompt[1:]
    if kind < 0.92:
        return prompt.rstrip(".?!") or prompt
    if kind < 0.95:
        return (prompt[0].lower() + prompt[1:]).rstrip(".?!") or prompt
    opening = ("Please: ", "Hello! ", "Now: ", "OK, ", "Next: ", "Quick question: ", "Hi, ")[int(rng.random() * 7)]
    return opening + prompt
