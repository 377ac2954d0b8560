"""A run's configuration: what its fields are (fields), and how a file and --set become one (reading)."""

from pipeline.config.fields import RunConfig as RunConfig
from pipeline.config.fields import SourceConfig as SourceConfig
from pipeline.config.reading import absolute as absolute
from pipeline.config.reading import document_of as document_of
from pipeline.config.reading import load_config as load_config
