"""Names of attributes: OpenTelemetry's conventions for generative AI, and ours where they have none.

The conventions are in development (2026-09: semantic-conventions-genai); tests/runtime/telemetry/test_conventions.py
holds these against what they require.
"""

from __future__ import annotations

from typing import Final

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_STREAM: Final = "gen_ai.request.stream"
OUTPUT_TYPE: Final = "gen_ai.output.type"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

# The only operation there is: text in, the text that follows it out.
TEXT_COMPLETION: Final = "text_completion"
PROVIDER_NAME: Final = "countersign"

REQUEST_ID: Final = "countersign.request.id"
RECEIPT: Final = "countersign.receipt.sha256"
VERDICT: Final = "countersign.verdict"
VERDICT_INDEX: Final = "countersign.receipt.index"
VIOLATION: Final = "countersign.violation"
INSTANCE: Final = "countersign.target.instance"
EPOCH: Final = "countersign.epoch"
DRAFTING: Final = "countersign.drafting"
ROUNDS: Final = "countersign.rounds"
DRAFTED: Final = "countersign.draft.proposed_tokens"
ACCEPTED: Final = "countersign.draft.accepted_tokens"
DRAFT_CALLS: Final = "countersign.draft.calls"
DRAFT_BUSY: Final = "countersign.draft.busy_s"
CACHED_BLOCKS: Final = "countersign.cache.blocks"
COMMIT_MEAN: Final = "countersign.commit.mean_s"
COMMIT_MAX: Final = "countersign.commit.max_s"

# The event of one round, on the target's span.
ROUND: Final = "countersign.round"
ROUND_TOKENS: Final = "countersign.round.tokens"
ROUND_DRAFTED: Final = "countersign.round.proposed"
ROUND_ACCEPTED: Final = "countersign.round.accepted"
ROUND_BATCH: Final = "countersign.round.batch"
ROUND_TIME: Final = "countersign.round.pass_s"
ROUND_COMMIT: Final = "countersign.round.commit_s"

# A trace with a span that has it is kept, sampled or not.
KEEP: Final = "countersign.keep"
