"""The config of a compact model: a LlamaConfig with one field more, the sharing plan."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .plan import SharingPlan


@strict
class SharedLlamaConfig(LlamaConfig):
    """A LlamaConfig whose ``sharing`` field holds a sharing plan, as `plan.json` does.

    Sizes (heads, hidden size, layers) are those of the dense model that the compact one equals.
    """

    model_type = "shared_llama"
    # Llama's plans shard whole projections; a compact projection stores a part of its rows.
    base_model_tp_plan = {}  # noqa: RUF012 - a class attribute in transformers
    base_model_pp_plan = {}  # noqa: RUF012

    sharing: dict[str, Any] | None = None

    reuse_rows: int = 16
    """Up to how many query rows followers multiply the leader's attention weights with their values
    (reuse); above, they call the attention kernel with its queries and keys (replay). 0: always
    replay. Both compute the same."""

    packed: bool = True
    """Whether projections whose units are tied, or whose weight is a product of factors, compute
    with one dense weight in evaluation mode without gradients. It is as fast as the dense model's,
    and takes as much memory beside the stored one; false saves that memory."""

    def validate_architecture(self) -> None:
        """Any number of heads: LlamaConfig refuses those that do not divide the hidden size, even
        where ``head_dim`` is stated. What does not fit the weights is found with them."""

    @property
    def plan(self) -> SharingPlan:
        """The validated plan. Raises PostshareError when it does not fit this config."""
        plan = SharingPlan() if self.sharing is None else SharingPlan.from_dict(self.sharing)
        plan.validate(self)
        return plan


__all__ = ["SharedLlamaConfig"]
