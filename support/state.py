"""What changes while something works, in and out: the part of a checkpoint that each object is responsible
for."""

import torch


class Stateful:
    """`CHANGES` names the attributes that change; all else comes from the constructor. Their state is a nest
    of dicts, lists, tensors, numbers and texts."""

    CHANGES = ()

    def state_dict(self):
        state = {}
        for name in self.CHANGES:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                value = value.get_state()
            elif hasattr(value, "state_dict"):
                value = value.state_dict()
            state[name] = list(value) if isinstance(value, (list, tuple)) else value
        return state

    def load_state_dict(self, state):
        for name in self.CHANGES:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                value.set_state(state[name])
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])
