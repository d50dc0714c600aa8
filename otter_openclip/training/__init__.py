"""What runs inside open_clip_train: flags, the teacher beside the student, repeatable data order."""
