"""Run folders: everything that is written to them and read from them.

Job (`job_spec`), exclusive access (`run_folder`, `lock`), tables and result (`run_writer`, `result`), machine and
software (`environment`), errors, checkpoints, and discovery of earlier runs (`discovery`).
"""
