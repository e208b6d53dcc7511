"""Import what commands and pages import sooner or later, in the process whose forks they are."""

import importlib
import os

# The command sets the last two before it imports anything else: a log has no progress bars.
os.environ |= {
    "COLUMNS": "400",
    "NO_COLOR": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
for name in (
    "infer_align_server.cli",
    "infer_align_server.serve",
    "infer_align_server.check_rewards.command",
    "infer_align_bench.serve",
    "infer_align_bench.quality.command",
    "openai",
    "infer_align.engines.fake",
    "infer_align.engines.openai",
    "infer_align.engines.transformers",
    "infer_align.rewards.classifier",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)
