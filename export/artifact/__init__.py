"""What lies in the folder of an artifact: written aside, listed with its hashes, checked before it is read."""
