"""A CUDA device that is not there: every tensor computes on the CPU, and some of them say that they are on `cuda:k`.

A `TorchFunctionMode` sees every call of torch's Python API. It takes CUDA devices out of the arguments before C++ sees
them, remembers where a tensor is said to be, and raises what CUDA would raise where devices are mixed. The numbers are
real, so whatever reads them works. Not seen: kernels, speed, rounding, memory, and what C++ does inside one call.
"""
import contextlib
import types

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device('cpu')
GETTERS = {getattr(torch.Tensor, n).__get__: n for n in ('device', 'is_cuda', 'is_cpu')}
SET_DATA = torch.Tensor.data.__set__
MAKERS = {'empty', 'zeros', 'ones', 'full', 'rand', 'randn', 'randint', 'arange', 'linspace', 'eye', 'tensor',
          'as_tensor', 'randperm', 'empty_strided', 'scalar_tensor', 'asarray'}
MIXERS = {'set_', 'swap_tensors', 'is_same_size', '_has_compatible_shallow_copy_type', 'copy_'}

class DeviceMix(RuntimeError):
    "What CUDA raises for tensors on several devices"

def said(tensor):
    "Where a tensor is said to be"
    return tensor.__dict__.get('_said', CPU)

def put(result, device):
    "Say of all tensors in a result that they are on a device"
    if isinstance(result, torch.Tensor):
        if device.type == 'cpu': result.__dict__.pop('_said', None)
        else: result.__dict__['_said'] = device
    elif isinstance(result, (list, tuple)):
        for part in result: put(part, device)
    return result

def tensors(given):
    if isinstance(given, torch.Tensor): yield given
    elif isinstance(given, (list, tuple)):
        for part in given: yield from tensors(part)
    elif isinstance(given, dict): yield from tensors(list(given.values()))

def cuda(given):
    "The CUDA device that an argument names, or None"
    if isinstance(given, str) and given.startswith('cuda'): given = torch.device(given)
    if isinstance(given, torch.device) and given.type == 'cuda': return torch.device('cuda', given.index or 0)
    return None

def without(given):
    "An argument with the CPU where it names a CUDA device"
    if cuda(given) is not None: return CPU
    if type(given) in (list, tuple): return type(given)(without(part) for part in given)
    if type(given) is dict: return {name: without(part) for name, part in given.items()}
    return given

def asked_for(args, kwargs):
    "The device that a call names, CPU or CUDA, or None"
    for given in (kwargs.get('device'), *args):
        if (device := cuda(given)) is not None: return device
        if given == 'cpu' or isinstance(given, torch.device) and given.type == 'cpu': return CPU
    return None

class PretendCuda(TorchFunctionMode):
    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', str(func))
        if func is torch.device and len(args) == 1 and type(args[0]) is int: args = (f'cuda:{args[0]}',)
        if name == 'to' and [type(given) for given in args[1:2]] == [int]:
            args = (args[0], f'cuda:{args[1]}', *args[2:])  # a number is a GPU
        if type(kwargs.get('device')) is int: kwargs = kwargs | dict(device=f"cuda:{kwargs['device']}")
        if func is torch.device or name == '_parse_to': return func(*args, **kwargs)
        if func in GETTERS: return self.get(GETTERS[func], func, args)
        if func == SET_DATA:
            func(*args)
            put(args[0], said(args[1]))
            return None
        if name in ('to', 'cuda', 'cpu', 'type_as'): return self.move(func, name, args, kwargs)
        given = list(tensors((args, kwargs)))
        asked = asked_for(args, kwargs)
        on = {said(t) for t in given}
        plain = func(*without(args), **without(kwargs)) if asked or on <= {CPU} else None
        if on <= {CPU}: return put(plain, asked) if asked and (name in MAKERS or name.startswith('new_')) else plain
        if name in ('numpy', '__array__'): raise TypeError("can't convert cuda device type tensor to numpy")
        where = self.one_place(name, given, args)
        result = plain if asked else func(*args, **kwargs)
        if any(result is t for t in given): return result  # in place
        return put(result, asked or where)

    def get(self, name, func, args):
        there = said(args[0])
        if there.type == 'cpu': return func(*args)
        return dict(device=there, is_cuda=True, is_cpu=False)[name]

    def move(self, func, name, args, kwargs):
        tensor = args[0]
        asked = asked_for(args[1:], kwargs)
        like = next(tensors((args[1:], kwargs)), None)
        goal = said(like) if like is not None else asked or said(tensor)
        if name == 'cuda':
            func = torch.Tensor.to
            args = tensor, CPU
            if not asked: goal = torch.device('cuda', 0)
        if name == 'cpu': goal = CPU
        moved = func(*without(args), **without(kwargs))
        if moved is tensor and goal != said(tensor): moved = tensor.clone()  # another device is another memory
        return moved if moved is tensor else put(moved, goal)

    def one_place(self, name, given, args):
        "The one device of a call's tensors; numbers of a CPU may join, and a CPU's index may select"
        free = [t for t in given if said(t).type != 'cpu' or t.ndim]
        if name in ('__getitem__', '__setitem__') and said(args[0]).type == 'cuda':
            index = list(tensors(args[1]))
            free = [t for t in free if not any(t is i for i in index) or said(t).type == 'cuda']
        if name == '__setitem__': free = [t for t in free if len(args) < 3 or t is not args[2]]
        places = {said(t) for t in free}
        if len(places) > 1 and name not in MIXERS:
            names = sorted(map(str, places))
            raise DeviceMix(f'Expected all tensors to be on the same device, but found {names} in {name}')
        return said(args[0]) if name in MIXERS else next(iter(places or {said(t) for t in given}))

@contextlib.contextmanager
def pretend(count=1):
    "Inside, torch says that there are GPUs"
    facts = types.SimpleNamespace(name='Pretended', total_memory=80 << 30, major=9, minor=0, multi_processor_count=132)
    fakes = dict(is_available=lambda: True, device_count=lambda: count, current_device=lambda: 0,
                 set_device=lambda device: None, get_device_name=lambda device=None: facts.name,
                 get_device_properties=lambda device=None: facts, get_device_capability=lambda device=None: (9, 0),
                 mem_get_info=lambda device=None: (70 << 30, 80 << 30), memory_allocated=lambda device=None: 0,
                 memory_reserved=lambda device=None: 0, max_memory_allocated=lambda device=None: 0,
                 empty_cache=lambda: None, synchronize=lambda device=None: None, is_initialized=lambda: True,
                 is_bf16_supported=lambda *args, **kwargs: True, _lazy_init=lambda: None)
    kept = {name: getattr(torch.cuda, name) for name in fakes}
    make = torch._C.TensorBase._make_subclass
    def make_subclass(kind, data, requires_grad=False, **more): # nn.Parameter(tensor)
        return put(make(kind, data, requires_grad, **more), said(data))
    pinned = torch.Tensor.pin_memory
    for name, fake in fakes.items(): setattr(torch.cuda, name, fake)
    torch.Tensor._make_subclass = staticmethod(make_subclass)
    torch.Tensor.pin_memory = lambda tensor, *args: tensor
    try:
        with PretendCuda() as mode: yield mode
    finally:
        torch.Tensor.pin_memory = pinned
        del torch.Tensor._make_subclass
        for name, true in kept.items(): setattr(torch.cuda, name, true)
