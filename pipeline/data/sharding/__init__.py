"""From a snapshot to shards: the plan, the tasks that write a shard or index a tar, and the record that each leaves."""
