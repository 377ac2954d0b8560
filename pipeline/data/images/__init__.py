"""One image: taken in when it is sharded, decoded and cropped when it is read."""
