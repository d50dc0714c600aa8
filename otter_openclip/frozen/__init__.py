"""What frozen towers give: computed once a batch, for student and teacher alike."""
