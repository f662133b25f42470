"""Only what pyproject.toml cannot hold well: configs/ is installed as ``gn_detect/configs``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gn_detect", "gn_detect.*"]), "gn_detect.configs"],
    package_dir={"gn_detect": "gn_detect", "gn_detect.configs": "configs"},
    package_data={
        "gn_detect.configs": ["**/*.yaml", "**/*.py"],
        "gn_detect.evaluation": ["report.html"],
    },
    include_package_data=False,  # else setuptools warns that each folder of configs is no package
)
