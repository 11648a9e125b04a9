"""Installation by pip, for development and for the core without ROS.

The ROS interfaces are not in it: CMake generates them (``colcon build``). Name, version and the
rest come from package.xml.
"""

from pathlib import Path
from xml.etree import ElementTree

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
package = ElementTree.parse(HERE / "package.xml").getroot()
requirements = (HERE / "requirements.txt").read_text().splitlines()

setup(
    name=package.findtext("name"),
    version=package.findtext("version"),
    description=package.findtext("description"),
    license=package.findtext("license"),
    maintainer=package.findtext("maintainer"),
    maintainer_email=package.find("maintainer").get("email"),
    packages=find_packages(include=["waste_seg_ros", "waste_seg_ros.*"]),
    package_data={"waste_seg_ros.dashboard": ["static/*"]},
    python_requires=">=3.11",
    install_requires=[line for line in (r.partition("#")[0].strip() for r in requirements) if line],
    entry_points={
        "console_scripts": ["waste-seg = waste_seg_ros.cli:main"],
    },
    zip_safe=False,
)
