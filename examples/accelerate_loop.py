"""Accelerate: it prepares the module like any other."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from stablekd_fast import Blockwise, models
from stablekd_fast.integrations.views import SampleViews

accelerator = Accelerator(cpu=True)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
teacher = models.build("resnet32", 10, 8)  # load the teacher's weights here
student = models.build("resnet20", 10, 8)
data = SampleViews("digits", views=4, batch_size=64)
skd = Blockwise(teacher, student, data, epochs, rows="teacher_rows")
optimizer = torch.optim.SGD(skd.parameters(), lr=0.05, momentum=0.9)
loader = DataLoader(data, batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(skd, optimizer, loader)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, skd.rate_at)

for epoch in range(epochs):
    skd.begin(epoch)
    for images, labels, keys in loader:
        loss = model(images, labels, keys).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    schedule.step()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
skd.close()
accelerator.save(student.state_dict(), "student.pt")
