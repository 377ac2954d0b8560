"""Experiment tracking in MLflow: one parent run per `mae run`, one child run per step.

A failure of MLflow never fails a training run. This is the only package that imports mlflow."""

from pipeline.errors import TrackingError as TrackingError
from pipeline.tracking.connection import NO_TRACKING as NO_TRACKING
from pipeline.tracking.connection import check_tracking as check_tracking
from pipeline.tracking.connection import client_of as client_of
from pipeline.tracking.connection import resolve_tracking_uri as resolve_tracking_uri
from pipeline.tracking.curves.journal import Journal as Journal
from pipeline.tracking.curves.journal import Point as Point
from pipeline.tracking.curves.node_metrics import node_metrics as node_metrics
from pipeline.tracking.curves.sender import deliver as deliver
from pipeline.tracking.curves.writer import NullTracker as NullTracker
from pipeline.tracking.curves.writer import Tracker as Tracker
from pipeline.tracking.curves.writer import open_tracker as open_tracker
from pipeline.tracking.mlflow_format import redact as redact
from pipeline.tracking.mlflow_format import redact_text as redact_text
from pipeline.tracking.mlflow_format import short_digest as short_digest
from pipeline.tracking.models import LinearScore as LinearScore
from pipeline.tracking.models import register_encoder as register_encoder
from pipeline.tracking.names import FINGERPRINT_TAG as FINGERPRINT_TAG
from pipeline.tracking.names import PARENT_TAG as PARENT_TAG
from pipeline.tracking.names import STEP_TAG as STEP_TAG
from pipeline.tracking.parents import Parent as Parent
from pipeline.tracking.parents import close_parent as close_parent
from pipeline.tracking.parents import open_parent as open_parent
from pipeline.tracking.reading import TrackedRun as TrackedRun
from pipeline.tracking.reading import parents_in as parents_in
from pipeline.tracking.reading import runs_by_id as runs_by_id
from pipeline.tracking.records import log_curve as log_curve
from pipeline.tracking.records import log_dataset as log_dataset
from pipeline.tracking.records import log_file as log_file
from pipeline.tracking.records import log_scores as log_scores
from pipeline.tracking.records import set_tags as set_tags
from pipeline.tracking.runs import RunStatus as RunStatus
from pipeline.tracking.runs import close_run as close_run
from pipeline.tracking.runs import find_child as find_child
from pipeline.tracking.runs import link_child as link_child
from pipeline.tracking.runs import open_child as open_child
from pipeline.tracking.runs import pages_of_children as pages_of_children
from pipeline.tracking.serve import serve as serve
from pipeline.tracking.serve import serve_command as serve_command
