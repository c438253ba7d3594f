from setuptools import setup

setup(
    packages=[
        "stablekd_fast", "stablekd_fast.blocks", "stablekd_fast.data", "stablekd_fast.models",
        "stablekd_fast.objectives", "stablekd_fast.report", "stablekd_fast.kernels", "stablekd_fast.bench",
    ],
    package_dir={"stablekd_fast.kernels": "kernels", "stablekd_fast.bench": "bench"},
)
