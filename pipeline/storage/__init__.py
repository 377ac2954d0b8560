"""Object stores behind one small interface: a folder (`FileStore`) or an S3 bucket (`S3Store`).

The only package that imports boto3 and botocore."""

from pipeline.storage.addresses import expand_address as expand_address
from pipeline.storage.connection import count_traffic as count_traffic
from pipeline.storage.folder import FileStore as FileStore
from pipeline.storage.opening import open_store as open_store
from pipeline.storage.opening import probe as probe
from pipeline.storage.s3 import S3Store as S3Store
from pipeline.storage.store import DeniedObject as DeniedObject
from pipeline.storage.store import MissingObject as MissingObject
from pipeline.storage.store import ObjectInfo as ObjectInfo
from pipeline.storage.store import Store as Store
from pipeline.storage.store import Traffic as Traffic
