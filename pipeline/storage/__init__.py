"""Object stores behind one small interface: a folder (`FileStore`) or an S3 bucket (`S3Store` in s3.py).

The only package that imports boto3 and botocore, and only once a bucket is opened."""

from pipeline.storage.addresses import expand_address as expand_address
from pipeline.storage.folder import FileStore as FileStore
from pipeline.storage.opening import open_store as open_store
from pipeline.storage.opening import probe as probe
from pipeline.storage.store import DeniedObject as DeniedObject
from pipeline.storage.store import MissingObject as MissingObject
from pipeline.storage.store import ObjectInfo as ObjectInfo
from pipeline.storage.store import Store as Store
from pipeline.storage.store import Traffic as Traffic
from pipeline.storage.traffic import count_traffic as count_traffic
