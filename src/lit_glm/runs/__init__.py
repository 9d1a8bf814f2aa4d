"""A run folder, and everything that is known of it from outside.

What is run (`job_spec`), who may write it (`run_folder`, `lock`), its tables and result (`run_writer`, `result`), what
it was measured on (`environment`), errors, checkpoints, and where earlier runs are (`discovery`).
"""
