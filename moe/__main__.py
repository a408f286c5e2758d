"""`python -m moe` and `torchrun … -m moe`."""

from moe.cli.main import main

if __name__ == "__main__":
    main()
