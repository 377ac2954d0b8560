"""Runs on Kubernetes: the pods of a KubeRay cluster (`cluster/`, `job/`; kustomize reads them too) and their rendering."""

from pipeline.cluster.kubernetes.rendering import Pods as Pods
from pipeline.cluster.kubernetes.rendering import rendered as rendered
