"""Ray behind plain functions: connect, run tasks, report progress, submit jobs. Nothing of Ray is imported before it is used."""

from pipeline.cluster.connection import connect as connect
from pipeline.cluster.connection import disconnect as disconnect
from pipeline.cluster.connection import draining as draining
from pipeline.cluster.connection import gpus as gpus
from pipeline.cluster.connection import here_drains as here_drains
from pipeline.cluster.connection import node_count as node_count
from pipeline.cluster.connection import room as room
from pipeline.cluster.jobs import job_logs as job_logs
from pipeline.cluster.jobs import job_status as job_status
from pipeline.cluster.jobs import list_runs as list_runs
from pipeline.cluster.jobs import stop_job as stop_job
from pipeline.cluster.jobs import submit_run as submit_run
from pipeline.cluster.progress import Progress as Progress
from pipeline.cluster.progress import ProgressBoard as ProgressBoard
from pipeline.cluster.tasks import Executor as Executor
from pipeline.cluster.tasks import Handle as Handle
from pipeline.cluster.tasks import map_tasks as map_tasks
from pipeline.cluster.tasks import submit as submit
