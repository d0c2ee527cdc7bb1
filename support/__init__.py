"""The ground floor: files, options, processes, state, figures. It imports nothing from outside this
folder."""
