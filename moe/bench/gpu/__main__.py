"""`python -m moe.bench.gpu key=value …`: the report without the imports of `moe` (see `moe.bench.gpu`)."""

import sys

from moe.bench.gpu import run
from moe.errors import UserError

if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"moe: {error}", file=sys.stderr)
        sys.exit(2)
