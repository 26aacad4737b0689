"""TensorBoard side of the audit: what is written to event files and the tab that shows it.

Empty on purpose: TensorBoard imports this package to find the plugin, so nothing here may pull in torch.
"""
