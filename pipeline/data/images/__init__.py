"""Work on one image: intake when its shard is written, decoding and cropping when it is read."""
