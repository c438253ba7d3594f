"""DistributedDataParallel: the same loop by several processes, which share the teacher's rows.

torchrun --nproc-per-node 2 ddp_loop.py
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from stablekd_fast import Blockwise, models
from stablekd_fast.integrations.views import SampleViews

dist.init_process_group("gloo")
torch.manual_seed(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
teacher = models.build("resnet32", 10, 8)  # load the teacher's weights here
student = models.build("resnet20", 10, 8)
data = SampleViews("digits", views=4, batch_size=32)  # the batch of a process
skd = Blockwise(teacher, student, data, epochs, rows="teacher_rows")
ddp = DistributedDataParallel(skd)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, skd.rate_at)
sampler = DistributedSampler(data)

for epoch in range(epochs):
    skd.begin(epoch)
    sampler.set_epoch(epoch)
    for images, labels, keys in DataLoader(data, batch_size=32, sampler=sampler):
        loss = ddp(images, labels, keys).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"process {dist.get_rank()}, epoch {epoch}: loss {loss.item():.4f}")
skd.close()
if dist.get_rank() == 0:
    torch.save(student.state_dict(), "student.pt")
dist.destroy_process_group()
