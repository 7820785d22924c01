"""`generate` of transformers over a runner: what it asks of a model, and what a graph cannot do for it."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, GenerationMixin

from cdsurgery.errors import InvalidInputError
from cdsurgery.export.runtime.past import check_cache


class RunnerGeneration(GenerationMixin):
    """The part of a runner that `GenerationMixin` sees."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    input_modalities = ("text",)

    def can_generate(self) -> bool:
        """True: `GenerationMixin` asks."""
        return True

    def is_remote_code(self) -> bool:
        """False: `GenerationMixin` asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None to choose: `GenerationMixin` asks."""
        return {}

    def _prepare_cache_for_generation(
        self: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Any:
        """`GenerationMixin` makes the cache: one that grows, whatever the configuration of the model asks for."""
        check_cache(model_kwargs.get("past_key_values"))
        generation_config.cache_implementation = None
        return GenerationMixin._prepare_cache_for_generation(
            self, generation_config, model_kwargs, *arguments, **options
        )

    def _assisted_decoding(self: Any, *arguments: Any, **options: Any) -> Any:
        """`GenerationMixin` checks several drafted tokens in one run, which takes logits at every position."""
        if self.manifest.options.positions == "last":
            raise InvalidInputError(
                "Assisted and prompt-lookup decoding need logits at every position, and this artifact returns those of "
                "the last one. Export with positions='all', or decode without an assistant."
            )
        if options["generation_config"].assistant_early_exit is not None:
            raise InvalidInputError(
                "assistant_early_exit drafts with the first layers of a model, and a graph runs all of them or none. "
                "Leave it out, or draft with an assistant_model."
            )
        return GenerationMixin._assisted_decoding(self, *arguments, **options)
