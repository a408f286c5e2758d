"""`moe evaluate`: a checkpoint on the tasks of EleutherAI's lm-evaluation-harness (`lm_eval`)."""
