"""Makes a batch's files of answers and errors out of its results."""

from collections.abc import Iterator, Sequence

from deployments.batches.file_shelf import FileShelf
from deployments.batches.input_lines import InputLine
from deployments.batches.records import BatchRecord, BatchStatus, Purpose, result_file_id
from deployments.batches.result_lines import not_run
from deployments.batches.results import ResultBook


def assemble(
    files: FileShelf, batch: BatchRecord, lines: Sequence[InputLine], book: ResultBook, ending: BatchStatus
) -> tuple[str | None, str | None]:
    """Write both files, each in the order of the batch's lines. Blocks. Doing it again writes the same files.

    Args:
        files: where they go.
        batch: the batch.
        lines: its lines.
        book: its results.
        ending: how it ends; lines without a result were not run for this reason.

    Returns:
        Ids of the file of answers and of the file of errors; None for one that would be empty.
    """
    answers = [i for i in range(len(lines)) if book.has(i) and not book.is_error(i)]
    num_errors = len(lines) - len(answers)
    output = _write(files, batch, book.texts(answers), is_error=False) if answers else None
    errors = _write(files, batch, _errors(batch, lines, book, ending), is_error=True) if num_errors else None
    return output, errors


def _errors(batch: BatchRecord, lines: Sequence[InputLine], book: ResultBook, ending: BatchStatus) -> Iterator[bytes]:
    """The errors of lines that ran, and of those that did not."""
    known = book.texts([i for i in range(len(lines)) if book.has(i) and book.is_error(i)])
    for i, line in enumerate(lines):
        if not book.has(i):
            yield not_run(batch.id, i, line.custom_id, ending)
        elif book.is_error(i):
            yield next(known)


def _write(files: FileShelf, batch: BatchRecord, texts: Iterator[bytes], *, is_error: bool) -> str:
    """Write one file; returns its id."""
    file_id = result_file_id(batch.id, is_error=is_error)
    upload = files.begin_as(batch.owner, file_id)
    try:
        for text in texts:
            upload.write(text + b"\n")
        name = f"{batch.id}_{'error' if is_error else 'output'}.jsonl"
        upload.keep(name, Purpose.BATCH_OUTPUT, batch.results_expire_after_s)
    except BaseException:
        upload.abort()
        raise
    return file_id
