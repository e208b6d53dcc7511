"""Triton kernels for value-guided decoding, each next to its torch reference.

The package depends on torch and triton only. On a CPU it uses Numba if that is installed.
"""

from infer_align_kernels.devices import runs_triton, staged
from infer_align_kernels.sibling_attention import (
    PrefixTable,
    sibling_attention,
    sibling_attention_at,
)
from infer_align_kernels.steer_logits import (
    HeadTable,
    SteeredRows,
    Workspace,
    compiled_layers,
    steer_logits,
    steers_at_once,
)
from infer_align_kernels.top_candidates import top_candidates
from infer_align_kernels.value_reweight import (
    CandidateValues,
    HeadValues,
    Sampled,
    add_head_values,
    candidate_values,
    reweight_logits,
    value_reweight,
)

__all__ = [
    "CandidateValues",
    "HeadTable",
    "HeadValues",
    "PrefixTable",
    "Sampled",
    "SteeredRows",
    "Workspace",
    "add_head_values",
    "candidate_values",
    "compiled_layers",
    "reweight_logits",
    "runs_triton",
    "sibling_attention",
    "sibling_attention_at",
    "staged",
    "steer_logits",
    "steers_at_once",
    "top_candidates",
    "value_reweight",
]
