"""Names under which the replay of a trace counts what it leaves out or changes."""

SKIPPED_LONG_PROMPTS = "skipped_long_prompts"
CUT_LONG_PROMPTS = "cut_long_prompts"
SKIPPED_BAD_ROWS = "skipped_bad_rows"
OF_EVERY_REPLAY = (SKIPPED_LONG_PROMPTS, CUT_LONG_PROMPTS, SKIPPED_BAD_ROWS)

SKIPPED_FAILED_CALLS = "skipped_failed_calls"
KEPT_FAILED_CALLS = "kept_failed_calls"
OF_FAILED_CALLS = (SKIPPED_FAILED_CALLS, KEPT_FAILED_CALLS)
