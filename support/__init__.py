"""The ground floor: files, options and processes. Nothing here imports anything of ours."""
