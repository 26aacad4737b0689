"""What training minimises: the task, the tap on its losses, their terms and the scale of these."""
