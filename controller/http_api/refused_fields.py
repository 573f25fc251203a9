"""Owns which fields of other servers are refused, and why. Pure.

Three kinds of fields that our bodies do not declare: those here would change the answer, so they are refused unless they carry
a neutral value; `HARMLESS` ones are accepted without a word; all others are ignored, as OpenAI-compatible peers do, and named
in the log.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdserve.errors import InvalidRequest

_LATER = "is not supported yet. Leave it out."
_STRUCTURE = "Structured output is not supported yet. Leave it out, and ask for the format in the prompt."
_TOOLS = "Tool calls are not supported yet. Leave it out, and describe the tools in a system message."
_TEXT_ONLY = "pdserve generates text only. Leave it out."

_REFUSED = {
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "response_format": _STRUCTURE,
    "structured_outputs": _STRUCTURE,
    "guided_json": _STRUCTURE,
    "guided_regex": _STRUCTURE,
    "guided_choice": _STRUCTURE,
    "guided_grammar": _STRUCTURE,
    "suffix": "Insertion is not supported: the served models continue text. Put what comes after into the prompt.",
    "best_of": "best_of is not supported. Ask for n choices with logprobs, and keep the best one.",
    "use_beam_search": "Beam search is not supported. Ask for n choices instead.",
    "length_penalty": "It belongs to beam search, which is not supported.",
    "prompt_embeds": "Prompts are text or token ids.",
    "prompt_logprobs": "Use echo with logprobs on /v1/completions.",
    "logprob_token_ids": _LATER,
    "allowed_token_ids": "Use logit_bias, with 100 for each token that is wanted.",
    "bad_words": "Use logit_bias, with -100 for each token that is not wanted.",
    "truncate_prompt_tokens": "Prompts are never cut. Shorten the prompt, or send its last token ids.",
    "skip_special_tokens": "Special tokens are always left out of the text. Use return_token_ids to see them.",
    "continue_final_message": "Use /v1/completions with the whole prompt.",
    "chat_template_kwargs": "The chat template takes no parameters from clients.",
    "documents": "Put the documents into a message.",
    "modalities": _TEXT_ONLY,
    "audio": _TEXT_ONLY,
    "web_search_options": "Web search is not supported. Leave it out.",
    "mm_processor_kwargs": _TEXT_ONLY,
}
_REFUSED_ALWAYS = {
    "kv_transfer_params": "KV transfers are the cluster's own matter and cannot be steered by clients.",
    "ec_transfer_params": "Transfers are the cluster's own matter and cannot be steered by clients.",
    "chat_template": "A template is a program: only the model's own one is run. Render the chat yourself and use /v1/completions.",
}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
        "reasoning_effort",
        "include_reasoning",
        "prediction",
        "spaces_between_special_tokens",
        "request_id",
        "session_id",
        "early_stopping",
        "truncation_side",
        "return_token_offsets",
        "vllm_xargs",
        "stream_interval",
    }
)


def _is_neutral(field: str, value: object) -> bool:
    if field in _NEUTRAL and any(value == neutral for neutral in _NEUTRAL[field]):
        return True
    if field == "skip_special_tokens":
        return value is None
    return value is None or value is False or value in ("", [], {})


def check_refused(extra: Mapping[str, object]) -> None:
    """Raises InvalidRequest, with the field as param, for the first field that would change the answer."""
    for field, value in extra.items():
        if field in _REFUSED_ALWAYS and value is not None:
            raise InvalidRequest(f"{field} is refused. {_REFUSED_ALWAYS[field]}", param=field)
        if field in _REFUSED and not _is_neutral(field, value):
            raise InvalidRequest(f"{field} cannot be used here. {_REFUSED[field]}", param=field)


def unknown_fields(extra: Mapping[str, object]) -> list[str]:
    """Names that are neither ours nor another server's."""
    known = HARMLESS | _REFUSED.keys() | _REFUSED_ALWAYS.keys()
    return [field for field in extra if field not in known]
