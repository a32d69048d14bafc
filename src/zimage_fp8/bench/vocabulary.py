"""The closed sets of words that a record uses, and what each means to a reader."""

from typing import NamedTuple


class MemoryMethod(NamedTuple):
    """How a peak was measured: for a table's header, for a phrase, and as a sentence."""

    header: str
    short: str
    sentence: str


# In order of preference for the table: the first that every variant has.
MEMORY_METHODS: dict[str, MemoryMethod] = {
    "nvml_process": MemoryMethod(
        "Peak GPU, NVML (GiB)",
        "peak GPU",
        "peak GPU memory of the server process, sampled through NVML",
    ),
    "nvml_device_growth": MemoryMethod(
        "Peak GPU growth, NVML (GiB)",
        "peak GPU growth",
        "peak memory of the GPU above what was used before the server started, sampled through "
        "NVML (the driver does not show this process by its id)",
    ),
    "torch_reserved": MemoryMethod(
        "Peak GPU, torch reserved (GiB)",
        "peak GPU reserved",
        "most memory torch's allocator held from the driver, as the server reports it",
    ),
    "torch_allocated": MemoryMethod(
        "Peak GPU, torch allocated (GiB)",
        "peak GPU allocated",
        "largest sum of live CUDA tensors, as the server reports it",
    ),
    "unified_growth": MemoryMethod(
        "Peak growth of used memory (GiB)",
        "peak growth of used memory",
        "peak of the machine's memory in use above what was used before the server started, "
        "sampled (GPU and CPU share it, and NVML has no figure for either)",
    ),
    "process_rss": MemoryMethod(
        "Peak RSS (GiB)",
        "peak RSS",
        "peak resident main memory of the server process since its start, loading included, as "
        "its kernel counts it",
    ),
    "sampled_rss": MemoryMethod(
        "Peak RSS, sampled (GiB)",
        "peak RSS",
        "peak resident main memory of the server process, sampled",
    ),
}

# kind of a flag -> what it means
FLAG_KINDS = {
    "unasked_guidance": "its times say that guidance ran although it was off",
    "ignored_guidance": "turning guidance on changed neither time nor picture",
    "ignored_steps": "twice the steps did not take longer",
    "unequal_forwards": "it ran another number of forwards than the reference",
    "other_size": "a picture has another size than was asked for",
    "flat_picture": "a picture has one colour everywhere, as black or NaN pictures have",
    "same_backend": "the attention floor ran the same backend as the reference",
    "same_pictures": "different prompts and seeds gave the same picture",
    "not_repeatable": "the same request gave different pictures",
    "ignored_seed": "another seed gave the same picture",
    "remembered_prompts": "timed requests skipped the text encoder, whose result was remembered",
    "unprobed": "whether guidance runs unasked could not be checked",
    "unsettled": "latency was still changing when timing began",
    "failed_requests": "requests failed under load",
    "busy_gpu": "another program used the GPU",
    "busy_machine": "other programs used the CPU",
    "throttled": "the GPU slowed down for heat or power",
    "memory_not_returned": "GPU memory was not back at its baseline after the server's end",
}
