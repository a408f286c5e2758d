"""Search spaces, studies and the processes that train their trials: `moe sweep`, `moe train -m`."""
