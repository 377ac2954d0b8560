"""What earlier runs left in a store: found again, checked, exported, forked, replayed, and cleaned up."""
