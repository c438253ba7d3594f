"""Plain PyTorch: StableKD in an ordinary loop; the teacher runs once for each view of an image."""

import sys

import torch
from torch.utils.data import DataLoader

from stablekd_fast import Blockwise, models
from stablekd_fast.integrations.views import SampleViews

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
teacher = models.build("resnet32", 10, 8)  # load the teacher's weights here
student = models.build("resnet20", 10, 8)
data = SampleViews("digits", views=4, batch_size=64)
skd = Blockwise(teacher, student, data, epochs, rows="teacher_rows")
optimizer = torch.optim.SGD(skd.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, skd.rate_at)
print(skd)

for epoch in range(epochs):
    skd.begin(epoch)
    for images, labels, keys in DataLoader(data, batch_size=64, shuffle=True):
        loss = skd(images, labels, keys).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
skd.close()
torch.save(student.state_dict(), "student.pt")
