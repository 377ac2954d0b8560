"""A run's configuration: its fields and their checks (`fields`), how a YAML file and --set become one (`reading`), and where
relative paths start (`paths`)."""

from pipeline.config.fields import Moved as Moved
from pipeline.config.fields import RunConfig as RunConfig
from pipeline.config.fields import SourceConfig as SourceConfig
from pipeline.config.fields import WeightsConfig as WeightsConfig
from pipeline.config.paths import absolute_address as absolute_address
from pipeline.config.reading import config_from as config_from
from pipeline.config.reading import load_config as load_config
from pipeline.config.reading import read_document as read_document
