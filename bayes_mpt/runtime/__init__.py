"""What a long call does besides its numbers: threads and workers, Ctrl-C, progress, files of finished work."""
