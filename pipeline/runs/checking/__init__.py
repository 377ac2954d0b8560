"""What is looked at before anything is trained: the configuration, the data, the cluster and this machine."""
