"""What users meet: the REST API, the dispatcher's SQL, the dashboard, the client and the CLI.

Importing it loads neither torch nor ray.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ddpsweep")
except PackageNotFoundError:
    __version__ = "0.0.0+source"
