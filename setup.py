"""Installs batchjax and pallas_kernels."""

import setuptools

# jax[tpu] brings libtpu, whose compiler needs no TPU.
_TEST = ["pytest>=8", "pytest-xdist>=3.6", "setuptools>=70.1", "hypothesis>=6", "jaxtyping>=0.3",
         "beartype>=0.20", "huggingface_hub>=0.34", "markdown-it-py>=3", "jax[tpu]"]

setuptools.setup(
    name="batchjax",
    version="0.1.0",
    description="Offline batched LLM inference on JAX: shared prefixes are computed and read once.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["batchjax*", "pallas_kernels*"]),
    package_data={"batchjax.report": ["page.html.j2"],
                  "pallas_kernels.shared_prefix_attention": ["tuned/*.json"]},
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "fsspec",
        "gguf>=0.17",
        "jax>=0.10.2",
        "jaxlib>=0.10.2",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "markupsafe",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2",
        "orbax-checkpoint>=0.11",
        "pyarrow>=17",
        "rich>=13",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
    ],
    extras_require={
        "test": _TEST,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "demo": ["jupyter"],
        # Models by their name on the Hub; outputs and inputs in cloud stores.
        "hub": ["huggingface_hub>=0.34"],
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
    },
)
