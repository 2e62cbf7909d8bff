"""Files and batches: lines of a file that are answered like requests. Plain Python; all state is in a store."""
