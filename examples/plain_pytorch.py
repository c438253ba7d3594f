"""Plain PyTorch: the loss is the only line that differs from an ordinary loop."""

import sys

import torch
from torch.utils.data import DataLoader

from stablekd_fast import models
from stablekd_fast.integrations.views import SampleViews
from stablekd_fast.losses import KDLoss

teacher = models.build("resnet32", 10, 8).eval()  # load the teacher's weights here
student = models.build("resnet20", 10, 8)
data = SampleViews("digits", views=4, batch_size=64)
criterion = KDLoss(temperature=4.0, alpha=0.9)
optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)

for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
    data.set_epoch(epoch)
    for images, labels, _ in DataLoader(data, batch_size=64, shuffle=True, drop_last=True):
        with torch.no_grad():
            targets = teacher(images)
        loss = criterion(student(images), targets, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
