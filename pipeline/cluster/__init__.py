"""Ray behind plain functions: connect to a cluster, run tasks, report progress, submit jobs.

Ray is imported inside the functions that need it: it takes seconds, and a run with executor `in_process` never does."""

from pipeline.cluster.autoscaler import may_grow as may_grow
from pipeline.cluster.autoscaler import room_asked_for as room_asked_for
from pipeline.cluster.connection import connect as connect
from pipeline.cluster.connection import cpus_per_gpu as cpus_per_gpu
from pipeline.cluster.connection import disconnect as disconnect
from pipeline.cluster.connection import gpu_inventory as gpu_inventory
from pipeline.cluster.connection import node_count as node_count
from pipeline.cluster.connection import this_node_is_draining as this_node_is_draining
from pipeline.cluster.connection import worker_capacity as worker_capacity
from pipeline.cluster.jobs import job_logs as job_logs
from pipeline.cluster.jobs import job_status as job_status
from pipeline.cluster.jobs import list_runs as list_runs
from pipeline.cluster.jobs import stop_job as stop_job
from pipeline.cluster.jobs import submit_run as submit_run
from pipeline.cluster.progress import ProgressBoard as ProgressBoard
from pipeline.cluster.sharing import hardware_decided as hardware_decided
from pipeline.cluster.sharing import steps_at_once as steps_at_once
from pipeline.cluster.tasks import Executor as Executor
from pipeline.cluster.tasks import Handle as Handle
from pipeline.cluster.tasks import call_reserved as call_reserved
from pipeline.cluster.tasks import map_tasks as map_tasks
from pipeline.cluster.tasks import submit as submit
from pipeline.cluster.tasks import wait_for_any as wait_for_any
