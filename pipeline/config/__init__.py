"""A run's configuration: its fields and their checks (`fields`), and how a YAML file and --set become one (`reading`)."""

from pipeline.config.fields import RunConfig as RunConfig
from pipeline.config.fields import SourceConfig as SourceConfig
from pipeline.config.reading import absolute_address as absolute_address
from pipeline.config.reading import load_config as load_config
from pipeline.config.reading import read_document as read_document
