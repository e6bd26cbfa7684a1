"""`python -m batchjax` is the console script `batchjax`."""

from batchjax.commands import main

if __name__ == "__main__":
  main()
