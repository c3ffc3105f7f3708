"""Under warp-transducer's name, so that pip never has both; see README.md."""

from setuptools import setup

setup(
    name="warprnnt_pytorch",
    version="0.3+espnet_pl",
    description="warp-transducer's Python interface with espnet_pl's loss behind it",
    author="The espnet_pl authors",
    license="Apache-2.0",
    packages=["warprnnt_pytorch"],
    python_requires=">=3.10",
    install_requires=["torch", "espnet_pl"],
)
