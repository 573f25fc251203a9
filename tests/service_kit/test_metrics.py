"""Metrics: names, aliases, buckets."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service_kit.metrics import FleetLoad, Metrics, RequestTimes

VLLM_NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:request_time_per_output_token_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
]


def _samples(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def _busy() -> Metrics:
    metrics = Metrics("tiny")
    metrics.requests.accepted(100)
    metrics.requests.first_token(0.03)
    metrics.requests.tokens(5)
    metrics.requests.token_gap(0.002)
    metrics.requests.finished("stop", RequestTimes(0.1, 0.2, 0.4, 0.7, 5))
    metrics.fleet.load(FleetLoad(3, 1, 100, 75, 0, {"prefill": 1, "decode": 2}))
    metrics.fleet.cache_config(16, 100)
    metrics.fleet.prefix_lookups(64, 48)
    return metrics


def test_every_vllm_name_of_the_interface_is_exposed_with_the_model_name() -> None:
    samples = _samples(_busy())
    for name in VLLM_NAMES:
        assert name in samples, name
        assert all(labels["model_name"] == "tiny" for labels, _ in samples[name]), name


def test_an_alias_has_the_value_of_ours() -> None:
    samples = _samples(_busy())
    assert samples["pdserve_kv_cache_usage_ratio"][0][1] == 0.25
    assert samples["vllm:kv_cache_usage_perc"][0][1] == 0.25
    assert samples["vllm:request_time_per_output_token_seconds_sum"][0][1] == 0.1
    assert samples["vllm:request_success_total"] == [({"model_name": "tiny", "finished_reason": "stop"}, 1.0)]


def test_ttft_buckets_are_those_that_dashboards_expect() -> None:
    samples = _samples(_busy())
    bounds = [labels["le"] for labels, _ in samples["vllm:time_to_first_token_seconds_bucket"]]
    assert bounds[:3] == ["0.001", "0.005", "0.01"]
    assert bounds[-2:] == ["2560.0", "+Inf"]


def test_an_unknown_rejection_reason_cannot_grow_the_labels() -> None:
    metrics = Metrics("tiny")
    for reason in ("overloaded", "made-up-1", "made-up-2"):
        metrics.requests.rejected(reason)
    metrics.transfer.handed_over("carrier pigeon", 10, 0.1, 0.2)
    samples = _samples(metrics)
    assert {labels["reason"] for labels, _ in samples["pdserve_rejections_total"]} == {"overloaded", "other"}
    assert [labels for labels, _ in samples["pdserve_kv_transfer_bytes_total"]] == [{"transport": "other"}]


def test_two_registries_of_one_process_do_not_meet() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.requests.accepted(7)
    assert _samples(second)["pdserve_prompt_tokens_total"][0][1] == 0.0
